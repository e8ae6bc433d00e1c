"""What scripts/release publishes: built once, from a clean clone of the tree as it is now, on a fresh environment."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from arkasr import files

ROOT = Path(__file__).parents[1]
PLAIN = (files.CONFIG, files.GENERATION_CONFIG, files.TOKENIZER)
TINY = {
    *(f"arkasr/weights/tiny/{name}" for name in (*PLAIN, files.WEIGHTS)),
    *(f"arkasr/weights/silero-vad/{name}" for name in ("vad.bin", "vad.onnx")),
    *(f"arkasr/weights/tiny-int8/{name}" for name in (files.MANIFEST, *PLAIN, *files.EXPORTED)),
}
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"}
SDIST = {
    ".gitignore", "CHANGELOG.md", "LICENSE", "NOTICE", "PKG-INFO", "README.md", "constraints.txt", "pyproject.toml",
    "src",
}  # fmt: skip
MAX_BYTES, MAX_FILE_BYTES = 12_000_000, 100_000
LIST_INSTALLED = """
import importlib.metadata, json
print(json.dumps([[found.metadata["Name"], found.version] for found in importlib.metadata.distributions()]))
"""


@dataclass(frozen=True)
class Release:
    """A clone, and what scripts/release wrote from its commit."""

    clone: Path
    folder: Path
    commit_time: int  # seconds since 1970

    def file(self, pattern: str) -> Path:
        (path,) = self.folder.glob(pattern)
        return path

    @property
    def version(self) -> str:
        return self.file("*.whl").name.split("-")[1]


def run(*command: str | Path, cwd: Path, umask: int = 0o022, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command with the interpreter of these tests as python3, and without its import path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SOURCE_DATE_EPOCH")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    environment = {**kept, "PATH": path, **environment}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, umask=umask, capture_output=True, text=True, check=False
    )


def succeed(*command: str | Path, cwd: Path, umask: int = 0o022, **environment: str) -> str:
    """The command's standard output; what it said on standard error, if it fails."""
    done = run(*command, cwd=cwd, umask=umask, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(folder: Path) -> None:
    succeed("git", "add", "--all", cwd=folder)
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    # Long ago, so that the clock of the build cannot pass for it.
    long_ago = "1700000001 +0930"
    succeed(
        "git", *identity, "commit", "--quiet", "--message", "the tree as it is",
        cwd=folder, GIT_AUTHOR_DATE=long_ago, GIT_COMMITTER_DATE=long_ago,
    )  # fmt: skip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def clone_of_the_tree(folder: Path) -> Path:
    """A repository with one commit: what git tracks here and does not ignore, uncommitted changes included."""
    listed = succeed("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # not deleted since the last commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    succeed("git", "init", "--quiet", cwd=folder)
    commit(folder)
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """One run of scripts/release; without the package registry a laptop skips, CI fails."""
    clone = clone_of_the_tree(tmp_path_factory.mktemp("clone"))
    done = run(clone / "scripts" / "release", cwd=clone)
    if "(from versions: none)" in done.stderr and "CI" not in os.environ:
        pytest.skip("the package registry does not answer")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == (clone / "dist" / "SHA256SUMS").read_text()
    commit_time = int(succeed("git", "log", "-1", "--format=%ct", cwd=clone))
    return Release(clone, clone / "dist", commit_time)


@pytest.fixture(scope="module")
def installed(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and what it needs, far from the repository."""
    folder = tmp_path_factory.mktemp("installed")
    succeed("python3", "-m", "venv", "--without-pip", "env", cwd=folder)
    constraints = release.clone / "constraints.txt"
    succeed(
        "python3", "-m", "pip", "--python", "env", "install", "--no-compile", "-c", constraints, release.file("*.whl"),
        cwd=folder,
    )  # fmt: skip
    return folder / "env"


def members(wheel: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            yield name, archive.read(name)


def test_the_folder_holds_the_release_and_its_sums(release: Release) -> None:
    stem = f"arkasr-{release.version}"
    published = {f"{stem}-py3-none-any.whl", f"{stem}.tar.gz", f"{stem}.cdx.json"}
    assert {path.name for path in release.folder.iterdir()} == {*published, "SHA256SUMS"}
    sums = dict(line.split("  ")[::-1] for line in release.file("SHA256SUMS").read_text().splitlines())
    assert sums == {name: sha256(release.folder / name) for name in published}
    assert succeed("git", "status", "--porcelain", cwd=release.clone) == ""  # nothing left behind
    assert not list(release.clone.glob("*.part"))


def test_the_wheel_holds_the_package_and_nothing_else(release: Release) -> None:
    content = dict(members(release.file("*.whl")))
    dist_info = {f"arkasr-{release.version}.dist-info/{name}" for name in DIST_INFO}
    package = content.keys() - dist_info
    sources = release.clone / "src"
    assert dist_info <= content.keys()
    assert {*TINY, "arkasr/py.typed"} <= package
    assert package == {
        str(path.relative_to(sources)) for path in (sources / "arkasr").rglob("*") if path.is_file()
    }  # every module, and no path that is absolute or leaves the package
    known = (
        r"arkasr/(\w+/)*(\w+\.py|py\.typed)|arkasr/(server|evaluate)/page/\w+\.(html|js|css|svg)"
        r"|arkasr/(metrics/english|evaluate/reference_rows)\.json"
    )
    strays = {name for name in package - TINY if not re.fullmatch(known, name)}
    assert strays == set()
    assert [name for name in content.keys() - TINY if len(content[name]) > MAX_FILE_BYTES] == []
    assert sum(map(len, content.values())) <= MAX_BYTES
    for name, data in content.items():
        assert name in dist_info or data == (sources / name).read_bytes(), name
        assert str(release.clone).encode() not in data, name
        assert str(ROOT).encode() not in data, name


def test_the_sdist_holds_what_the_wheel_needs(release: Release) -> None:
    with tarfile.open(release.file("*.tar.gz")) as archive:
        parts = [Path(name).parts for name in archive.getnames()]
        sizes = [member.size for member in archive.getmembers()]
    assert {top for top, *_ in parts} == {f"arkasr-{release.version}"}
    assert {second for _, second, *_ in parts} == SDIST
    assert sum(sizes) <= MAX_BYTES


def test_times_in_the_wheel_are_the_commits(release: Release) -> None:
    commit_time = datetime.fromtimestamp(release.commit_time // 2 * 2, UTC)  # zip counts in steps of two seconds
    with zipfile.ZipFile(release.file("*.whl")) as archive:
        assert {info.date_time for info in archive.infolist()} == {commit_time.timetuple()[:6]}


def test_a_stranger_builds_the_same_wheel_from_the_sdist(release: Release, tmp_path: Path) -> None:
    succeed(
        "python3", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, release.file("*.tar.gz"),
        cwd=tmp_path, umask=0o077, TZ="FAR+11", LC_ALL="C", SOURCE_DATE_EPOCH=str(release.commit_time),
        PIP_CONSTRAINT=str(release.clone / "constraints.txt"),
    )  # fmt: skip
    wheel = release.file("*.whl")
    assert sha256(tmp_path / wheel.name) == sha256(wheel)


@pytest.mark.usefixtures("release")  # which knows whether the package registry answers
def test_builds_that_differ_are_refused(tmp_path: Path) -> None:
    """Archives that take the files' own times, as hatchling makes them when told so."""
    clone = clone_of_the_tree(tmp_path / "clone")
    with (clone / "pyproject.toml").open("a") as pyproject:
        pyproject.write("\n[tool.hatch.build]\nreproducible = false\n")
    commit(clone)
    done = run(clone / "scripts" / "release", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"scripts/release: arkasr-\S+ differs between two builds of \w+; look for .*\n", done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"clone"}


def test_a_tree_with_changes_is_refused(release: Release) -> None:
    stray = release.clone / "src" / "arkasr" / "stray.py"
    stray.touch()
    done = run(release.clone / "scripts" / "release", "out", cwd=release.clone)
    stray.unlink()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "scripts/release: the tree is not as committed (src/arkasr/stray.py); "
        "commit, or put it away: git stash --include-untracked\n"
    )


def test_a_folder_with_files_is_refused(release: Release) -> None:
    done = run(release.clone / "scripts" / "release", cwd=release.clone)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"scripts/release: {release.folder} is not empty; remove it or give another folder\n"


def test_the_wheel_installs_and_runs_elsewhere(release: Release, installed: Path, tmp_path: Path) -> None:
    succeed("python3", "-m", "pip", "--python", installed, "check", cwd=tmp_path)
    python, program = installed / "bin" / "python", installed / "bin" / "ark-asr"
    place = succeed(python, "-c", "import arkasr; print(arkasr.__file__)", cwd=tmp_path)
    assert place.startswith(str(installed))
    assert succeed(program, "--version", cwd=tmp_path) == f"ark-asr {release.version}\n"
    done = run(program, "transcribe", ROOT / "examples" / "audio" / "an4-rubout.flac", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "RUBOUT G M E F THREE NINE\n"), done.stderr


def test_the_install_is_light(installed: Path) -> None:
    """No torch, and at most 250 MB; pip and setuptools, which a venv brings, add 20."""
    names = {path.name for path in (installed / "lib").rglob("site-packages/*")}
    assert "onnxruntime" in names
    assert not names & {"torch", "transformers"}
    assert sum(path.lstat().st_size for path in installed.rglob("*") if path.is_file()) <= 250_000_000


def test_the_sbom_lists_every_installed_package(release: Release, installed: Path, tmp_path: Path) -> None:
    """Its validity against the CycloneDX schema is checked by scripts/release itself."""
    text = release.file("*.cdx.json").read_text()
    sbom = json.loads(text)
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    root = sbom["metadata"]["component"]
    assert (root["name"], root["version"]) == ("arkasr", release.version)
    assert [entry["license"]["id"] for entry in root["licenses"]] == ["Apache-2.0"]
    assert datetime.fromisoformat(sbom["metadata"]["timestamp"]).timestamp() == release.commit_time

    listed = {(component["name"], component["version"]) for component in sbom["components"]}
    present = {
        (name, version)
        for name, version in json.loads(succeed(installed / "bin" / "python", "-c", LIST_INSTALLED, cwd=tmp_path))
    }
    assert listed | {("arkasr", release.version)} == present
    # It declares its licence as free text, which cyclonedx-py does not take over.
    silent = {component["name"] for component in sbom["components"] if not component.get("licenses")}
    assert silent <= {"protobuf"}
    pins = (release.clone / "constraints.txt").read_text().replace("_", "-").splitlines()
    assert {f"{name}=={version}".lower().replace("_", "-") for name, version in listed} <= set(pins)

    assert "serialNumber" not in sbom  # it would be random
    assert not re.search(r'"/|file:', text)  # no path of the machine that built it
    assert str(release.clone) not in text
