"""The part of the command line that trains: sft, teacher-data, opd, align-heads and export."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from arkasr.errors import MissingExtraError
from arkasr.train import flags

app = typer.Typer(help="Train a model.", no_args_is_help=True, rich_markup_mode=None)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("sft", add_help_option=False, context_settings=PASSED_ON)
def sft(context: typer.Context) -> None:
    """Supervised fine-tuning over JSONL manifests; --help lists the flags."""
    _run("sft", context.args)


@app.command("teacher-data", add_help_option=False, context_settings=PASSED_ON)
def teacher_data(context: typer.Context) -> None:
    """Label audio with a teacher, and keep what can be believed; --help lists the flags."""
    _run("teacher-data", context.args)


@app.command("opd", add_help_option=False, context_settings=PASSED_ON)
def opd(context: typer.Context) -> None:
    """On-policy distillation: a teacher judges the student's own words; --help lists the flags."""
    _run("opd", context.args)


@app.command("align-heads", add_help_option=False, context_settings=PASSED_ON)
def align_heads(context: typer.Context) -> None:
    """Find the attention heads by which word times are told; --help lists the flags."""
    _run("align-heads", context.args)


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --out of a training run.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint of this update  [default: the newest]")] = None,
    live: Annotated[bool, typer.Option("--live", help="The weights themselves, not their moving average.")] = False,
) -> None:
    """Write a checkpoint of a run in the published layout and print the folder."""
    _module("loop").export(run, target, step=step, live=live)
    print(target)


def _run(command: str, argv: Sequence[str]) -> None:
    program = _module(command.replace("-", "_"))
    config = flags.parse_flags(program.Config, argv, program=f"ark-asr train {command}", about=program.__doc__ or "")
    if config is not None:
        program.main(config)


def _module(name: str) -> Any:
    """A module of training, imported only now: help needs no PyTorch."""
    try:
        return importlib.import_module(f"arkasr.train.{name}")
    except ImportError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("train: PyTorch is not installed; pip install 'arkasr[train]'") from None
