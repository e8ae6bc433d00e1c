"""Flags before the environment before the file; what is unknown or bad is refused in one line."""

from pathlib import Path

import pytest

from arkasr.errors import MissingExtraError, UsageError
from arkasr.server.settings import PREFIX, read_settings
from conftest import MakeCheckpoint, Run

FRONT = ["--engine", "openai", "--model", "whatever it is called there", "--base-url", "http://127.0.0.1:9/v1"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text('port = 1001\nhost = "::1"\nmodel = ["3b", "tiny"]\nmax_upload_mb = 7.5\noffline = true\n')
    return path


def test_flags_count_before_the_environment_before_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}PORT", "1002")
    monkeypatch.setenv(f"{PREFIX}HOST", "127.0.0.2")
    settings = read_settings(["--config", str(file), "--port", "1003"])
    assert (settings.port, settings.host, settings.model) == (1003, "127.0.0.2", ["3b", "tiny"])
    assert settings.max_upload_bytes == 7_500_000
    assert settings.offline


def test_the_file_may_be_named_by_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}CONFIG", str(file))
    assert read_settings([]).port == 1001


def test_lists_are_flags_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(["--model", "tiny", "--model", "0.6b", "--alias", "a=tiny"]).model == ["tiny", "0.6b"]
    monkeypatch.setenv(f"{PREFIX}MODEL", '["tiny", "3b"]')
    assert read_settings([]).model == ["tiny", "3b"]


@pytest.mark.timeout(60)  # a bad one that is taken begins to serve
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "abc"], "port"),
        (["--port", "70000"], "port"),
        (["--max-requests", "0"], "max-requests"),
        (["--engine", "gpu"], "engine"),
        (["--config", "/nonexistent/x.toml"], "/nonexistent/x.toml"),
        (["--alias", "whisper-1=nothing", "--model", "tiny"], "whisper-1=nothing"),
        (["--host", "0.0.0.0", "--model", "tiny"], "keys create"),  # noqa: S104
        (["--host", "::", "--model", "tiny"], "keys create"),
        (["--host", "example.org", "--model", "tiny"], "keys create"),
        (["--model", "tiny", "--url-network", "everything", "--url-host", "*"], "no network"),
        (["--engine", "openai", "--model", "tiny"], "--base-url"),
        (["--engine", "openai", "--base-url", "http://127.0.0.1:9/v1"], "--model"),
        (["--model", "tiny", "--base-url", "http://127.0.0.1:9/v1"], "--base-url: only with --engine openai"),
        (["--model", "tiny", "--engine", "onnx", "--api-key-env", "X", "--parallel", "2"], "--api-key-env, --parallel"),
        ([*FRONT, "--device", "cpu", "--dtype", "int8"], "--device, --dtype: not with engine openai"),
        ([*FRONT, "--unload-after-s", "5", "--workers", "2"], "--unload-after-s"),
        ([*FRONT, "--parallel", "0"], "parallel"),
        ([*FRONT, "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY: not set"),
        ([*FRONT[:-1], "ftp://127.0.0.1/v1"], "127.0.0.1"),
    ],
)
def test_what_is_bad_is_one_line_that_names_it(arguments: list[str], named: str, run: Run, tmp_path: Path) -> None:
    code, out, err = run("serve", "--state", str(tmp_path), *arguments)
    assert (code, out, len(err)) == (1, [], 1)
    assert named in err[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_model_is_said_at_the_start(
    workers: int, make_checkpoint: MakeCheckpoint, run: Run, tmp_path: Path
) -> None:
    folder = make_checkpoint()
    (folder / "tokenizer.json").write_text("{")
    code, out, err = run("serve", "--state", str(tmp_path / "state"), "--model", str(folder), "--workers", str(workers))
    assert (code, out, len(err)) == (1, [], 1)
    assert "tokenizer.json" in err[0]


def test_vllm_is_one_process_and_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(_name: str) -> object:
        return object() if installed else None

    monkeypatch.setattr("importlib.util.find_spec", found)
    installed = True
    read_settings(["--engine", "vllm", "--model", "tiny"]).check_engine()
    with pytest.raises(UsageError, match="--workers: engine vllm is one process"):
        read_settings(["--engine", "vllm", "--model", "tiny", "--workers", "2"]).check_engine()
    installed = False
    with pytest.raises(MissingExtraError, match=r"arkasr\[vllm\]"):
        read_settings(["--engine", "vllm", "--model", "tiny"]).check_engine()


def test_a_back_end_in_the_environment_and_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "server.toml"
    path.write_text('engine = "openai"\nbase_url = "http://h/v1"\nmodel = ["a", "b"]\nparallel = 3\n')
    monkeypatch.setenv(f"{PREFIX}API_KEY_ENV", "KEY_OF_H")
    settings = read_settings(["--config", str(path), "--parallel", "4"])
    settings.check_engine()
    assert (settings.base_url, settings.model, settings.parallel) == ("http://h/v1", ["a", "b"], 4)
    assert settings.api_key_env == "KEY_OF_H"


@pytest.mark.parametrize("text", ["bogus = 3", "port = [", "port = 'x'"])
def test_a_bad_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"serve: .*--help"):
        read_settings(["--config", str(path)])


def test_keys_of_the_machine_itself_are_seen(tmp_path: Path, run: Run) -> None:
    """Made, listed, revoked and used up by the command line alone."""
    state = ["--state", str(tmp_path)]
    code, out, _ = run("keys", "create", "ward 3", "--price", "0.36/hour", "--concurrent-requests", "2", *state)
    assert code == 0
    assert len(out) == 1
    assert out[0].startswith("ark-")
    code, listed, _ = run("keys", "list", *state)
    assert listed[0].startswith("ward 3: valid since ")
    assert listed[0].endswith("; 2 at once; price 0.36/hour")
    assert out[0] not in (tmp_path / "keys.json").read_text()
    assert run("keys", "revoke", "ward 3", *state)[0] == 0
    assert run("keys", "list", *state)[1][0].startswith("ward 3: revoked ")
    assert run("keys", "create", "x", "--price", "free", *state)[0] == 1
    code, _, err = run("usage", *state)
    assert code == 1
    assert "usage.sqlite3" in err[0]


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("192.0.2.1", False), ("::", False),
     ("192.168.1.2", False), ("::ffff:192.168.1.2", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_what_only_this_machine_can_reach(host: str, local: bool) -> None:
    assert read_settings(["--host", host]).is_local is local
