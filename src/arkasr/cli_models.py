"""`ark-asr models`: download, check and remove models; and how other commands get theirs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from arkasr import export, hub, pins
from arkasr.checkpoint import open_checkpoint
from arkasr.errors import ArkASRError

app = typer.Typer(help="Download, check and remove models.", no_args_is_help=True, rich_markup_mode=None)

TINY_NOTICE = (
    "model tiny: a small demonstration model for English letters, digits, dates and short commands; "
    "for real transcription run `ark-asr models pull 0.6b` once, which makes 0.6b the default"
)


class DtypeChoice(StrEnum):
    """Names of --dtype."""

    AUTO = "auto"
    INT8 = "int8"
    INT4 = "int4"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


MODEL_HELP = "0.6b, 3b, tiny, ORG/NAME@COMMIT of a hub, or a checkpoint's folder."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help=f"{MODEL_HELP}  [default: 0.6b when it was downloaded, else tiny]")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[DtypeChoice, typer.Option(help="Precision; auto is int8 on a CPU and float32 on CUDA.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Make no network call; HF_HUB_OFFLINE=1 says the same.")]


def report(line: str) -> None:
    """Say something that is no result."""
    print(f"ark-asr: {line}", file=sys.stderr)


def chosen(model: str | None, *, offline: bool) -> Path:
    """The folder of a model, or of the default one, with a notice where that is a small one."""
    if model is None:
        model = hub.default_model()
        if model == "tiny":
            print(TINY_NOTICE, file=sys.stderr)
    return pull(model, offline=offline)


def pull(model: str, *, offline: bool) -> Path:
    """The model's folder, downloaded with a bar on standard error if a person watches."""
    with bar(model, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        return hub.pull(model, offline=offline, report=report, progress=progress)


@contextmanager
def bar(text: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if a person watches, once it is told what is done and how much there is."""
    console = Console(stderr=True)
    off = not console.is_terminal
    shown = (TextColumn(text, markup=False), *columns)
    with Progress(*shown, console=console, disable=off, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(text, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


@app.command("list")
def list_models() -> None:
    """Show built-in and downloaded models: name, state, size, origin."""
    for model in hub.models():
        size = f"{model.num_bytes / 1e6:.0f} MB" if model.num_bytes else "-"
        print(f"{model.name:<8} {model.state:<10} {size:>8}  {model.origin}")


@app.command("pull")
def pull_model(model: ModelArgument, offline: OfflineOption = False) -> None:
    """Download and check a model; an interrupted download goes on."""
    folder = pull(model, offline=offline)
    open_checkpoint(folder)
    print(folder)


@app.command("verify")
def verify_models(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP}  [default: all on this machine]")
    ] = None,
) -> None:
    """Hash every file, and check config, tokenizer and tensors."""
    failed = 0
    for model in models or [listed.name for listed in hub.models() if listed.state in {"here", "shipped"}]:
        try:
            folder = hub.find(model)
            lock = pins.verify(folder)
            exported = None if open_checkpoint(folder).shards else export.read_manifest(folder, hashes=True)
        except ArkASRError as error:
            print(f"ark-asr: {error}", file=sys.stderr)
            failed += 1
            continue
        known = lock or exported
        done = f"{len(known.files)} files have their SHA-256" if known else "no lock file, so bytes were not compared"
        print(f"{model}: {done}; config, tokenizer and tensors fit")
    if failed:
        raise typer.Exit(1)


@app.command("path")
def print_path(model: ModelArgument) -> None:
    """Print the folder of a model that is on this machine."""
    print(hub.find(model))


@app.command("remove")
def remove_model(model: ModelArgument) -> None:
    """Delete a downloaded model, complete or not."""
    freed = hub.remove(model)
    print(f"ark-asr: {model} removed, {freed / 1e6:.0f} MB freed", file=sys.stderr)
