import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from arkasr import __version__
from conftest import MakeCheckpoint, Run
from test_audio import BAD_FILES, encoded, noise, write_bad_file

# run("transcribe", ...) -> exit code, lines of stdout, lines of stderr

KEYS = {"file", "text", "segments", "duration", "confidence", "timings"}
# Random weights hear words in noise, where the VAD hears nobody and the guards believe nothing.
RANDOM = ("--no-vad", "--no-guard")
FEW = ("--max-new-tokens", "3", *RANDOM)


@pytest.fixture
def model(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    """Three readable recordings."""
    paths = [tmp_path / f"{name}.wav" for name in "abc"]
    for seed, path in enumerate(paths):
        path.write_bytes(encoded(noise(4_000 + 900 * seed, seed=seed)))
    return paths


def assert_refused(outcome: tuple[int, list[str], list[str]], *parts: str) -> None:
    """Exit code 1, nothing on standard output, and one line that says all the parts."""
    code, out, err = outcome
    assert (code, out, len(err)) == (1, [], 1), outcome
    assert err[0].startswith("ark-asr: ")
    assert all(part in err[0] for part in parts), err


def test_text_is_all_that_stdout_gets(run: Run, model: Path, clips: list[Path]) -> None:
    code, out, err = run("transcribe", *clips, "--model", model, *FEW)
    assert (code, len(out), err) == (0, 3, [])
    assert run("transcribe", clips[1], "--model", model, *FEW) == (0, [out[1]], [])


def test_json_lines(run: Run, model: Path, clips: list[Path]) -> None:
    code, out, err = run("transcribe", *clips, "--model", model, "--format", "json", *FEW)
    assert (code, err) == (0, [])
    for path, line in zip(clips, out, strict=True):
        record = json.loads(line)
        assert record.keys() >= KEYS
        assert record["file"] == str(path)
        assert record["duration"] == pytest.approx(soundfile.info(path).duration, abs=1e-4)
        (segment,) = record["segments"]
        assert len(segment["tokens"]) <= 3
        assert (segment["start"], segment["flags"]) == (0, [])
        assert {"log_mel", "encoder", "prefill", "decode", "load"} <= record["timings"].keys()
        assert 0 <= record["confidence"] <= 1
        assert all(seconds >= 0 for seconds in record["timings"].values())


@pytest.mark.parametrize("batch_size", ["1", "8"])
def test_a_bad_file_stops_no_other(run: Run, model: Path, clips: list[Path], batch_size: str) -> None:
    missing = clips[0].with_name("missing.wav")
    files = [clips[0], missing, clips[1]]
    asked = ["transcribe", *files, "--model", model, "--batch-size", batch_size, *FEW]
    code, out, err = run(*asked)
    assert (code, len(out)) == (1, 2)
    assert err == [f"ark-asr: {missing}: no such file; check the path", "ark-asr: 1 of 3 files failed"]
    code, out, _ = run(*asked, "--format", "json")
    records = [json.loads(line) for line in out]
    assert (code, [record["file"] for record in records]) == (1, [str(file) for file in files])
    assert records[1] == {"file": str(missing), "error": f"{missing}: no such file; check the path"}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_audio_is_one_line(run: Run, model: Path, tmp_path: Path, name: str) -> None:
    path = write_bad_file(tmp_path, name)
    assert_refused(run("transcribe", path, "--model", model), f"ark-asr: {path}: ")


def test_lengths_that_are_not_taken(run: Run, model: Path, tmp_path: Path) -> None:
    for num_samples, cause in ((1, "less than one 10 ms frame"), (159, "less than one")):
        (tmp_path / "a.wav").write_bytes(encoded(noise(num_samples)))
        for options in ((), RANDOM):
            assert_refused(run("transcribe", tmp_path / "a.wav", "--model", model, *options), "a.wav: ", cause)
    for num_samples in (160, 480_001):
        (tmp_path / "a.wav").write_bytes(encoded(noise(num_samples)))
        assert run("transcribe", tmp_path / "a.wav", "--model", model, *FEW)[0] == 0


def test_a_folder_is_no_recording(run: Run, model: Path, tmp_path: Path) -> None:
    assert_refused(run("transcribe", tmp_path, "--model", model), "is a directory")


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_output_dir(run: Run, model: Path, clips: list[Path], tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "new" / "folder"
    asked = ["transcribe", *clips, tmp_path / "no.wav", "--model", model, "--format", suffix, *FEW]
    code, out, _ = run(*asked, "--output-dir", folder)
    assert (code, out) == (1, [])
    assert visible(folder) == sorted([*(f"{name}.{suffix}" for name in "abc"), "arkasr.jobs.jsonl"])
    assert all(len(path.read_text(encoding="utf-8").splitlines()) == 1 for path in folder.glob(f"*.{suffix}"))


def visible(folder: Path) -> list[str]:
    """Names in a folder but for hidden ones, of which a lock is one."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_output_names_that_collide(run: Run, model: Path, clips: list[Path], tmp_path: Path) -> None:
    twin = tmp_path / "other" / "a.flac"
    outcome = run("transcribe", *clips, twin, "--model", model, "--output-dir", tmp_path / "out")
    assert_refused(outcome, str(clips[0]), str(twin), "rename one")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(run: Run, model: Path, clips: list[Path], tmp_path: Path) -> None:
    """Regression: the temporary a.txt.part stayed behind."""
    asked = ["transcribe", clips[0], "--model", model, *FEW, "--output-dir"]
    assert_refused(run(*asked, clips[1]), "b.wav", "cannot be written", "--output-dir")
    (tmp_path / "out" / "a.txt").mkdir(parents=True)
    assert_refused(run(*asked, tmp_path / "out"), "a.txt: cannot be written")
    assert visible(tmp_path / "out") == ["a.txt", "arkasr.jobs.jsonl"]


def test_names_that_are_alike_where_no_file_is_written(run: Run, model: Path, clips: list[Path]) -> None:
    """Regression: two folders with an a.wav each were refused on standard output, too."""
    twin = clips[0].parent / "other" / "a.wav"
    twin.parent.mkdir()
    twin.write_bytes(clips[0].read_bytes())
    code, out, err = run("transcribe", clips[0], twin, "--model", model, *FEW)
    assert (code, len(out), err) == (0, 2, [])
    assert out[0] == out[1]


@pytest.mark.parametrize("extra", [("--format", "txt", "--format", "json"), ("--resume",)])
def test_what_needs_an_output_dir(run: Run, model: Path, clips: list[Path], extra: tuple[str, ...]) -> None:
    assert_refused(run("transcribe", *clips, "--model", model, *extra), "--output-dir")


@pytest.mark.parametrize(
    ("option", "value", "cause"),
    [
        *[("--temperature", "-1", "temperature is -1.0"), ("--temperature", "nan", "temperature is nan")],
        *[("--temperature", "inf", "temperature is inf"), ("--temperature", "1e39", "temperature")],
        *[("--temperature", "1e-40", "temperature"), ("--max-new-tokens", "0", "max_new_tokens is 0")],
        *[("--max-new-tokens", "-7", "max_new_tokens is -7"), ("--batch-size", "0", "batch_size is 0")],
        *[("--batch-size", "-1", "batch_size is -1"), ("--batch-size", str(2**70), "batch_size")],
        *[("--seed", str(2**70), "seed"), ("--device", "nonsense", "nonsense")],
        *[("--shard", "0/2", "shard"), ("--shard", "3/2", "shard"), ("--shard", "half", "shard")],
        *[("--max-line-width", "0", "max_line_width"), ("--max-line-count", "-1", "max_line_count")],
        *[("--device", "", "device ''"), ("--device", "cuda:99", "device"), ("--device", "meta", "device")],
        *[("--device", "mps", "device"), ("--device", "cpu:5", "device")],
    ],
)
def test_bad_options(run: Run, model: Path, clips: list[Path], option: str, value: str, cause: str) -> None:
    assert_refused(run("transcribe", clips[0], "--model", model, option, value), cause)


@pytest.mark.parametrize(
    ("option", "value"), [("--engine", "foo"), ("--dtype", "int7"), ("--format", "xml"), ("--batch-size", "many")]
)
def test_words_that_are_no_choice(run: Run, clips: list[Path], option: str, value: str) -> None:
    code, out, err = run("transcribe", clips[0], option, value)
    assert (code, out) == (2, [])
    assert option in err[-1]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("nope", "folder"), ("no/such/folder", "folder"), ("0.6b", "models pull 0.6b"), ("3B", "models pull 3B")],
)
def test_unknown_models(run: Run, clips: list[Path], name: str, remedy: str) -> None:
    assert_refused(run("transcribe", clips[0], "--model", name), f"ark-asr: {name}: ", remedy)


def test_folders_without_a_model(run: Run, model: Path, clips: list[Path], tmp_path: Path) -> None:
    assert_refused(run("transcribe", clips[0], "--model", clips[0]), "no such model")
    (tmp_path / "empty").mkdir()
    assert_refused(run("transcribe", clips[0], "--model", tmp_path / "empty"), "no config.json")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (model / name).unlink()
        assert_refused(run("transcribe", clips[0], "--model", model), f"{model}: ", "no")


def test_standard_input(run: Run, model: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["transcribe", "-", "--model", model, "--format", "json", *FEW]

    def given(content: bytes) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(content))))
        return run(*asked)

    code, out, err = given(clips[0].read_bytes())
    assert (code, err) == (0, [])
    assert json.loads(out[0])["file"] == "standard input"
    code, out, err = given(b"")
    assert (code, json.loads(out[0])["file"]) == (1, "standard input")
    assert err == ["ark-asr: standard input: empty file (0 bytes); record or copy it again"]


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, [f"ark-asr {__version__}"], [])
    code, out, _ = run("transcribe", "--help")
    assert code == 0
    options = (
        "--model",
        "--output-dir",
        "--batch-size",
        "--temperature",
        "--resume",
        "--shard",
        "--no-vad",
        "--no-guard",
    )
    assert all(option in "\n".join(out) for option in options)


def ark_asr(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The installed program as a user starts it."""
    program = Path(sys.executable).with_name("ark-asr")
    return subprocess.run(
        [program, *arguments], input=stdin, capture_output=True, env=os.environ | environment, check=False
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
def test_the_installed_program(model: Path, clips: list[Path], tmp_path: Path) -> None:
    """Regression: a pipe by name (`<(...)`) and a name that is no UTF-8 both ended in a traceback."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen(["cp", clips[1], pipe])
    files: list[str | Path] = [clips[0], pipe, "-", os.fsdecode(b"caf\xff.wav")]
    asked = ["transcribe", *files, "--model", model, "--format", "json", *FEW]
    done = ark_asr(*asked, stdin=clips[2].read_bytes(), PYTHONIOENCODING="utf-8:strict")
    writer.wait(timeout=5)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.keys() >= KEYS for line in lines] == [True, True, True, False]
    assert [line["file"] for line in lines] == [str(clips[0]), str(pipe), "standard input", "caf\udcff.wav"]
    assert len(done.stderr.splitlines()) == 2
    assert done.returncode == 1


PROBE = """
import os, sys
before = dict(os.environ)
{work}
assert dict(os.environ) == before
heavy = sorted({{"torch", "onnxruntime", "transformers"}} & sys.modules.keys())
assert not heavy, heavy
"""
HELP = """
sys.argv = {argv!r}
from arkasr import cli
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code
"""


@pytest.mark.parametrize(
    "argv", [[], ["ark-asr", "--help"], ["ark-asr", "transcribe", "--help"], ["ark-asr", "--version"]]
)
def test_light_imports(argv: list[str]) -> None:
    work = HELP.format(argv=argv) if argv else "import arkasr"
    done = subprocess.run([sys.executable, "-c", PROBE.format(work=work)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == bool(argv)


def test_samples_reach_the_network_as_they_were(run: Run, model: Path, tmp_path: Path) -> None:
    samples = noise(6_000)
    lines = set()
    for kind, name in (("WAV", "a.wav"), ("FLAC", "a.flac"), ("AIFF", "a.aiff")):
        (tmp_path / name).write_bytes(encoded(np.round(samples * 2**15) / 2**15, kind=kind))
        lines.add(tuple(run("transcribe", tmp_path / name, "--model", model, *FEW)[1]))
    assert len(lines) == 1


def test_text_goes_to_stdout_also_beside_a_progress_bar() -> None:
    """With standard error on a terminal the bar once carried the text away with it, and `> out.txt` stayed empty."""
    import pty

    clip = str(Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac")
    terminal, end = pty.openpty()
    program = str(Path(sys.executable).with_name("ark-asr"))
    command = [program, "transcribe", clip, clip, clip, "--model", "tiny", "--batch-size", "1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, env=environment, text=True) as process:
        os.close(end)
        assert process.stdout is not None
        assert process.stdout.read() == "RUBOUT G M E F THREE NINE\n" * 3
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert process.returncode == 0
    assert "transcribing" in shown
    assert "RUBOUT" not in shown


def test_the_runtime_keeps_to_itself(tmp_path: Path) -> None:
    """ONNX Runtime's official builds begin a device id, a database and an uploader of usage events at import."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    told = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | told
    program = Path(sys.executable).with_name("ark-asr")
    clip = Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac"
    done = subprocess.run(
        [program, "transcribe", "--model", "tiny", clip], env={**environment, "TMPDIR": str(temporary)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "RUBOUT G M E F THREE NINE\n"
    assert [*home.rglob("*"), *temporary.rglob("*")] == []
