"""The command line. Promise: text on stdout, everything else on stderr; exit code 1 when any file failed."""

import importlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from arkasr import __version__, audio, cli_keys, cli_models, export, jobs
from arkasr.checkpoint import open_checkpoint
from arkasr.cli_models import (
    DeviceOption,
    DtypeChoice,
    DtypeOption,
    ModelArgument,
    ModelOption,
    OfflineOption,
    bar,
    chosen,
    pull,
    report,
)
from arkasr.engines import ANSWER_S, MAX_NEW_TOKENS, PARALLEL, DecodeOptions
from arkasr.errors import ArkASRError, MissingExtraError, UsageError
from arkasr.results import (
    DEFAULT_SUBTITLES,
    WRITERS,
    Segment,
    SubtitleOptions,
    Transcript,
    added,
    write_json_error,
)
from arkasr.transcribe import BATCH_SIZE, MAX_BATCH_SIZE, Transcriber, load_model

LATER = {"listen": "arkasr.cli_listen", "eval": "arkasr.cli_eval", "train": "arkasr.cli_train"}


class _Commands(TyperGroup):
    """The commands; what measures or trains is imported when it is asked for: no short transcription waits for it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *LATER]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in LATER:
            return super().get_command(ctx, cmd_name)
        command = typer.main.get_command(importlib.import_module(LATER[cmd_name]).app)
        command.name = cmd_name
        return command


app = typer.Typer(
    name="ark-asr",
    cls=_Commands,
    help="Transcribe speech with the ARK-ASR models, natively and offline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_keys.app, name="keys")
app.command("usage")(cli_keys.usage)

PER_PLACE = 8  # spans of a batch for each that an endpoint hears at a time, lest the last ones hold up the next batch
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


class EngineChoice(StrEnum):
    """Names of --engine."""

    AUTO = "auto"
    PYTORCH = "pytorch"
    ONNX = "onnx"
    VLLM = "vllm"
    OPENAI = "openai"


class PrecisionChoice(StrEnum):
    """Names of --precision."""

    INT8 = "int8"
    INT4 = "int4"
    FLOAT32 = "float32"


class FormatChoice(StrEnum):
    """Names of --format."""

    TXT = "txt"
    SRT = "srt"
    VTT = "vtt"
    TSV = "tsv"
    JSON = "json"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ark-asr {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def transcribe(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Audio files; - is standard input.")],
    model: ModelOption = None,
    offline: OfflineOption = False,
    engine: Annotated[
        EngineChoice, typer.Option(help="What runs the network; openai is the endpoint at --base-url.")
    ] = EngineChoice.AUTO,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Of an OpenAI-compatible endpoint, such as http://HOST:8000/v1.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that has the endpoint's key.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(help=f"Spans that the endpoint is asked for at a time.  [default: {PARALLEL}]")
    ] = None,
    answer_s: Annotated[
        float | None,
        typer.Option(help=f"Most seconds for the endpoint's answer, all tries counted.  [default: {ANSWER_S:g}]"),
    ] = None,
    budget_s: Annotated[
        float | None,
        typer.Option(help="Most seconds of audio sent to the endpoint, all tries counted.  [default: no limit]"),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = DtypeChoice.AUTO,
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens a clip; its duration limits them too.")
    ] = MAX_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above it tokens are sampled.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Spans that share a pass; the text does not depend on it.  "
            f"[default: {BATCH_SIZE}; {PER_PLACE} times --parallel of an endpoint]"
        ),
    ] = None,
    formats: Annotated[
        list[FormatChoice] | None,
        typer.Option("--format", help="txt, srt, vtt, tsv or json; give it again for several.  [default: txt]"),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write files here, one per input and format, instead of to standard output.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Take the audio files in folders, too.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip what --output-dir already has, and go on.")] = False,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Do the I-th of N parts of the inputs.")] = "1/1",
    max_line_width: Annotated[
        int, typer.Option(help="Columns of a subtitle's line.")
    ] = DEFAULT_SUBTITLES.max_line_width,
    max_line_count: Annotated[int, typer.Option(help="Lines of a subtitle.")] = DEFAULT_SUBTITLES.max_line_count,
    word_timestamps: Annotated[
        bool, typer.Option("--word-timestamps", help="Tell when each word was said, in json, srt and vtt.")
    ] = False,
    highlight_words: Annotated[
        bool, typer.Option("--highlight-words", help="Underline each word in vtt while it is said.")
    ] = False,
    vad: Annotated[bool, typer.Option("--vad/--no-vad", help="Find where speech is, and leave out the rest.")] = True,
    guard: Annotated[bool, typer.Option("--guard/--no-guard", help="End loops, and hear doubtful spans again.")] = True,
) -> None:
    """Transcribe audio of any length: text on standard output, everything else on standard error."""
    names = list(dict.fromkeys(choice.value for choice in formats or [FormatChoice.TXT]))
    _check_words(word_timestamps, highlight_words, engine, names)
    options = DecodeOptions(max_new_tokens, temperature, seed, guard, align=word_timestamps)
    subtitles = SubtitleOptions(max_line_width, max_line_count, word_timestamps, highlight_words)
    if output_dir is None and (len(names) > 1 or resume):
        raise UsageError("several formats, and --resume, need --output-dir")
    found = jobs.find(files, recursive=recursive)
    inputs = jobs.shard(found if output_dir is None else jobs.distinct(found), shard)
    here = {"device": device, "dtype": dtype.value, "offline": offline}
    there = {"base_url": base_url, "key_variable": api_key_env, "parallel": parallel, "answer_s": answer_s,
             "budget_s": budget_s}  # fmt: skip
    if batch_size is None:
        is_there = engine is EngineChoice.OPENAI
        batch_size = min(PER_PLACE * (parallel or PARALLEL), MAX_BATCH_SIZE) if is_there else BATCH_SIZE
    with _recognizer(engine, model, here, there) as load:
        if output_dir is not None:
            with jobs.Outputs(output_dir, names, subtitles, part=shard, resume=resume) as outputs:
                waiting = [one for one in inputs if not outputs.is_done(one)]
                if len(waiting) < len(inputs):
                    report(f"{len(inputs) - len(waiting)} of {len(inputs)} files are done already")
                failed = _run(load, waiting, outputs.add, options, vad=vad, batch_size=batch_size) if waiting else 0
        elif names == ["txt"] and len(inputs) == 1:
            failed = 0
            _print_as_heard(load().segments(inputs[0].name, options=options, vad=vad, batch_size=batch_size))
        else:
            deliver = partial(_print, format_name=names[0], options=subtitles)
            failed = _run(load, inputs, deliver, options, vad=vad, batch_size=batch_size, to_stdout=True)
        if failed:
            if len(inputs) > 1:
                print(f"ark-asr: {failed} of {len(inputs)} files failed", file=sys.stderr)
            raise typer.Exit(1)


def _check_words(asked: bool, highlighted: bool, engine: EngineChoice, names: list[str]) -> None:
    """Refuse what would be left alone without a word."""
    if highlighted and not (asked and "vtt" in names):
        raise UsageError("--highlight-words needs --word-timestamps and --format vtt")
    if asked and not {"json", "srt", "vtt"} & set(names):
        raise UsageError("--word-timestamps needs --format json, srt or vtt; the others have no place for words")
    if asked and engine in (EngineChoice.OPENAI, EngineChoice.VLLM):
        raise UsageError(f"--word-timestamps: engine {engine} tells no times of words; use onnx or pytorch")


@contextmanager
def _recognizer(
    engine: EngineChoice, model: str | None, here: dict[str, Any], there: dict[str, Any]
) -> Iterator[Callable[[], Transcriber]]:
    """What loads the model, with the options of engines on this machine, or of an endpoint."""
    is_there = engine is EngineChoice.OPENAI
    for name, value in (here if is_there else there).items():
        if value not in (None, False, "auto"):
            flag = {"key_variable": "api_key_env"}.get(name, name).replace("_", "-")
            raise UsageError(f"--{flag} does not go with --engine {engine}; leave it out")
    if not is_there:
        folder = chosen(model, offline=here["offline"])
        yield lambda: load_model(folder, engine=engine.value, device=here["device"], dtype=here["dtype"], report=report)
        return
    if model is None or there["base_url"] is None:
        raise UsageError("--engine openai: give --base-url http://HOST:8000/v1 and --model, as the endpoint calls it")
    from arkasr.engines.openai import OpenAIEngine  # no short transcription waits for an HTTP client

    given = {name: value for name, value in there.items() if value is not None}
    with closing(OpenAIEngine(model=model, **given)) as remote:
        if remote.notice:
            report(remote.notice)
        yield lambda: Transcriber(remote)


def _run(
    load: Callable[[], Transcriber],
    inputs: list[jobs.Input],
    deliver: Callable[[jobs.Input, Transcript | ArkASRError], None],
    options: DecodeOptions,
    *,
    vad: bool,
    batch_size: int,
    to_stdout: bool = False,
) -> int:
    """Transcribe files and deliver what becomes of each; returns how many failed."""
    failed = 0
    outcomes = load().outcomes([one.name for one in inputs], options=options, vad=vad, batch_size=batch_size)
    with _progress(len(inputs), text_on_terminal=to_stdout and sys.stdout.isatty()) as advance:
        for one, (_, outcome) in zip(inputs, outcomes, strict=True):
            if isinstance(outcome, ArkASRError):
                failed += 1
                print(f"ark-asr: {outcome}", file=sys.stderr)
            deliver(one, outcome)
            advance(outcome.duration_s if isinstance(outcome, Transcript) else 0.0)
    return failed


def _print(one: jobs.Input, outcome: Transcript | ArkASRError, *, format_name: str, options: SubtitleOptions) -> None:
    if isinstance(outcome, Transcript):
        WRITERS[format_name](outcome, sys.stdout, options)
    elif format_name == "json":
        write_json_error(audio.describe(one.name), str(outcome), sys.stdout)
    sys.stdout.flush()


def _print_as_heard(segments: Iterator[Segment]) -> None:
    """Text as soon as it is known; what was heard before an error stays."""
    text = ""
    try:
        for segment in segments:
            more = added(text, segment.text)
            sys.stdout.write(more)
            sys.stdout.flush()
            text += more
    finally:
        if text:
            print(flush=True)
    if not text:
        print()


@contextmanager
def _progress(total: int, *, text_on_terminal: bool) -> Iterator[Callable[[float], None]]:
    """A bar on standard error for many files, if a person watches and the text does not itself show how far it is."""
    console = Console(stderr=True)
    columns = (
        TextColumn("transcribing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("RTFx {task.fields[rtfx]:.1f}"),
    )
    off = total < 2 or not console.is_terminal or text_on_terminal
    started, heard_s = time.perf_counter(), 0.0
    # rich would send our text, too, to its own console, which is standard error.
    with Progress(*columns, console=console, disable=off, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("transcribing", total=total, rtfx=0.0)

        def advance(duration_s: float) -> None:
            nonlocal heard_s
            heard_s += duration_s
            bar.update(task, advance=1, rtfx=heard_s / (time.perf_counter() - started))

        yield advance


@app.command("export")
def export_model(
    model: ModelArgument,
    precision: Annotated[
        PrecisionChoice, typer.Option(help="How weights are stored; int8 is what a CPU runs best.")
    ] = PrecisionChoice.INT8,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder  [default: in the cache, where it is found again]")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Convert a model for the CPU engine and print the folder, which is a model itself."""
    source = open_checkpoint(pull(model, offline=offline))
    with bar(model, BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) as progress:
        print(export.find_or_write(source, precision.value, folder=output, report=report, progress=progress))


@app.command("serve", add_help_option=False, context_settings=PASSED_ON)
def serve_models(context: typer.Context) -> None:
    """Serve OpenAI's audio API; --help lists the flags."""
    try:
        from arkasr.server import serve, settings
    except ImportError as error:
        if error.name is None or error.name.startswith("arkasr"):
            raise
        raise MissingExtraError(f"serve: {error.name} is not installed; pip install 'arkasr[serve]'") from None
    serve.serve(settings.read_settings(context.args))


@app.command("batch")
def batch(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Audio files; with --read, the results.")],
    read: Annotated[
        Path | None, typer.Option(metavar="BATCH", help="Print the texts that the results have for this batch.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Where vLLM finds the files; without, the batch holds their bytes.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Take the audio files in folders, too.")] = False,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Write the I-th of N parts of the files.")] = "1/1",
) -> None:
    """Write a batch for `vllm run-batch` to standard output, or read its results: a line of JSON for each file."""
    if read is not None and (url is not None or recursive or shard != "1/1"):
        raise UsageError("--url, --recursive and --shard are for writing a batch, not for --read")
    failed = total = 0
    lines = (
        jobs.write_batch(jobs.shard(list(dict.fromkeys(jobs.find(files, recursive=recursive))), shard), url=url)
        if read is None
        else jobs.read_batch(read, map(Path, files))
    )
    for total, line in enumerate(lines, 1):  # noqa: B007 - counted
        if isinstance(line, ArkASRError):
            failed += 1
            print(f"ark-asr: {line}", file=sys.stderr)
        else:
            print(line)
    if failed:
        print(f"ark-asr: {failed} of {total} files failed", file=sys.stderr)
        raise typer.Exit(1)


def main() -> None:
    """Entry point: users' mistakes become one line on standard error and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that is no UTF-8, a terminal without Chinese
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except ArkASRError as error:
        print(f"ark-asr: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our text has gone, as in `ark-asr ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
