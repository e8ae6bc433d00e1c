"""The part of the command line that measures: eval run, score, compare, robust and report."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from arkasr.engines import Dtype, EngineName
from arkasr.errors import UsageError
from arkasr.evaluate import datasets, harder, manifest, report, robust, run, sections, selfreport, study
from arkasr.evaluate.datasets import Dataset
from arkasr.evaluate.page import tables
from arkasr.evaluate.page.tables import Table
from arkasr.evaluate.score import averages
from arkasr.evaluate.systems import OwnSystem, System
from arkasr.files import write_text_atomically
from arkasr.metrics import normalize, regimes

app = typer.Typer(
    help="Measure by the Open ASR Leaderboard's protocol, and beyond it.", no_args_is_help=True, rich_markup_mode=None
)

SETS_HELP = (
    "Test sets: a JSONL, NeMo or leaderboard manifest, a TSV, a Kaldi folder, a folder of Hub parquet files, "
    f"ORG/NAME@COMMIT of a hub, or {harder.NONSPEECH} for made silence, noise and tones."
)
SetsArgument = Annotated[list[str], typer.Argument(metavar="SET...", help=SETS_HELP)]
ResultsArgument = Annotated[
    list[Path], typer.Argument(metavar="RESULTS...", help="Folders of `eval run`, one for each system, or manifests.")
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For manifests and run.json.")]
ModelOption = Annotated[
    str, typer.Option(metavar="MODEL", help="0.6b, 3b, tiny, ORG/NAME@COMMIT of a hub, or a checkpoint's folder.")
]
EngineOption = Annotated[EngineName, typer.Option(help="What runs the network.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision; auto is int8 on a CPU and float32 on CUDA.")]
BaseUrlOption = Annotated[
    str | None, typer.Option(metavar="URL", help="Hear with MODEL of this OpenAI-compatible endpoint instead.")
]
KeyOption = Annotated[
    str | None, typer.Option("--api-key-env", metavar="NAME", help="Environment variable with the endpoint's key.")
]
TransformersOption = Annotated[
    bool, typer.Option("--transformers", help="Hear with MODEL in Hugging Face Transformers, without its code.")
]
BatchOption = Annotated[int, typer.Option(help="Clips heard together.")]
WarmupOption = Annotated[int, typer.Option(help="Batches heard before the clock runs.")]
VadOption = Annotated[bool, typer.Option("--vad/--no-vad", help="Whether a detector says where speech is.")]
LimitOption = Annotated[int | None, typer.Option(help="Only the first rows.")]
KindOption = Annotated[datasets.Kind, typer.Option(help="Layout of the sets.")]
ConfigOption = Annotated[str, typer.Option(help="Part of a parquet folder or hub dataset.")]
SplitOption = Annotated[str, typer.Option(help="Rows of this split.")]
NameOption = Annotated[str | None, typer.Option(help="Of a single set, in results.  [default: its folder's]")]
LanguageOption = Annotated[str, typer.Option(help="Of rows that state none.")]
RowsOption = Annotated[int | None, typer.Option(metavar="N", help="Rows that a single set must have.")]
DownloadOption = Annotated[bool, typer.Option("--allow-download", help="Fetch hub datasets and models.")]
RegimeOption = Annotated[
    str, typer.Option(help=f"Of leaderboard sets: {', '.join(regimes.REGIMES)}; no number goes without its label.")
]
NormalizerOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"{', '.join(normalize.NAMES)}.  [default: the regime's, or the language's]"),
]


@app.command("run")
def run_sets(
    sets: SetsArgument,
    output: OutputOption,
    model: ModelOption = "tiny",
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    base_url: BaseUrlOption = None,
    api_key_env: KeyOption = None,
    transformers: TransformersOption = False,
    batch_size: BatchOption = 16,
    warmup: WarmupOption = 10,
    vad: VadOption = True,
    limit: LimitOption = None,
    kind: KindOption = "auto",
    config: ConfigOption = "",
    split: SplitOption = "test",
    name: NameOption = None,
    language: LanguageOption = "en",
    rows: RowsOption = None,
    keep_empty: Annotated[
        bool,
        typer.Option("--keep-empty", help="Hear rows with an empty reference, too: what is said there is made up."),
    ] = False,
    regime: RegimeOption = regimes.DEFAULT,
    normalizer: NormalizerOption = None,
    allow_download: DownloadOption = False,
) -> None:
    """Have a system hear test sets: leaderboard manifests; goes on where it was stopped. Prints the scores."""
    if len(sets) > 1 and (name is not None or rows is not None):
        raise UsageError("--name and --rows are of a single set; run the others by themselves")
    opened = [
        _open(
            place, kind=kind, config=config, split=split, name=name, language=language, rows=rows,
            keep_empty=keep_empty, regime=regime, allow_download=allow_download,
        )
        for place in sets
    ]  # fmt: skip
    with _system(
        model, engine=engine, device=device, dtype=dtype, base_url=base_url, api_key_env=api_key_env,
        transformers=transformers, batch_size=batch_size, vad=vad, language=language, allow_download=allow_download,
    ) as system:  # fmt: skip
        failed = _hear(opened, system, output, batch_size=batch_size, warmup=warmup, limit=limit)
    if limit is None:
        found = study.read(output, normalizer=normalizer, regime=regime)
        _print(study.score_table([found], regime))
        _notes([found])
    else:
        _say(f"{output}: the first {limit} rows only, which is no score; `ark-asr eval score` has the numbers")
    if failed:
        raise typer.Exit(1)


@app.command("robust")
def run_conditions(
    sets: SetsArgument,
    output: OutputOption,
    suite: Annotated[str, typer.Option(help=f"Conditions: {', '.join(robust.SUITES)}.")] = "standard",
    conditions: Annotated[
        list[str] | None, typer.Option("--condition", metavar="NAME", help="Instead of a suite; again for several.")
    ] = None,
    noise: Annotated[
        str | None, typer.Option(metavar="SET", help="A set of recorded noise, for the conditions that mix it in.")
    ] = None,
    model: ModelOption = "tiny",
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    base_url: BaseUrlOption = None,
    api_key_env: KeyOption = None,
    transformers: TransformersOption = False,
    batch_size: BatchOption = 16,
    vad: VadOption = True,
    limit: LimitOption = None,
    split: SplitOption = "test",
    language: LanguageOption = "en",
    normalizer: NormalizerOption = None,
    allow_download: DownloadOption = False,
) -> None:
    """Have a system hear test sets under noise, reverberation, telephone, codecs ..., the same in every run."""
    chosen = tuple(map(robust.condition, conditions)) if conditions else robust.suite(suite)
    chosen, notes = robust.runnable(chosen, recorded=noise is not None)
    for note in notes:
        _say(note)
    recorded = _open(noise, split=split, keep_empty=True) if noise is not None else None
    opened = [
        dataset
        for place in sets
        for dataset in harder.under(_open(place, split=split, language=language), chosen, recorded=recorded)
    ]
    with _system(
        model, engine=engine, device=device, dtype=dtype, base_url=base_url, api_key_env=api_key_env,
        transformers=transformers, batch_size=batch_size, vad=vad, language=language, allow_download=allow_download,
    ) as system:  # fmt: skip
        failed = _hear(opened, system, output, batch_size=batch_size, warmup=0, limit=limit)
    found = study.read(output, normalizer=normalizer, regime=regimes.NONE)
    for table in study.robustness_tables([found]):
        _print(table)
    _notes([found])
    if failed:
        raise typer.Exit(1)


@app.command("score")
def score(
    results: ResultsArgument,
    regime: RegimeOption = regimes.DEFAULT,
    normalizer: NormalizerOption = None,
    self_report: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Write a model repository's {selfreport.FILE} there.")
    ] = None,
    source: Annotated[str, typer.Option(metavar="URL", help="Where the predictions are, for --self-report.")] = "",
) -> None:
    """Score manifests, of `eval run` or of anybody else; a row for each set."""
    found = study.read_all(results, normalizer=normalizer, regime=regime)
    _print(study.score_table(found, regime))
    _notes(found)
    if self_report is not None:
        if len(found) != 1:
            raise UsageError(f"--self-report is of one system, and {len(found)} are given; score it by itself")
        average, day = averages(found[0].scores, regime), datetime.now(UTC).date().isoformat()
        write_text_atomically(
            self_report, selfreport.eval_results_yaml(found[0].scores, average, date=day, source=source)
        )


@app.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Folder or manifest of the one system.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Of the other.")],
    regime: RegimeOption = regimes.DEFAULT,
    normalizer: NormalizerOption = None,
) -> None:
    """Compare two systems by paired tests; "better" is said only where the interval excludes no difference."""
    one, other = study.read_all([first, second], normalizer=normalizer, regime=regime)
    table = study.comparison_table(one, other)
    if not table.rows:
        raise UsageError(f"{first} and {second}: no set with reference words in common ({table.note or 'none at all'})")
    _print(table)
    _notes([one, other])


@app.command("report")
def write_report(
    results: ResultsArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For report.html, .md and .json.")],
    title: Annotated[str, typer.Option(help="Of the report.")] = "Evaluation",
    speed: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RESULTS", help="A run with another batch size, for the plot of speed; again for several."
        ),
    ] = None,
    embed_audio: Annotated[bool, typer.Option("--embed-audio", help="Put short clips into the page.")] = False,
    regime: RegimeOption = regimes.DEFAULT,
    normalizer: NormalizerOption = None,
) -> None:
    """Write one HTML file that opens offline, with Markdown and JSON beside it; of one system, or of two compared."""
    found = study.read_all(results, normalizer=normalizer, regime=regime)
    speeds = [study.read(place, normalizer=normalizer, regime=regime) for place in speed or []]
    report.write(sections.report(title, found, regime, speeds=speeds), output, embed_audio=embed_audio)
    _say(f"{output / 'report.html'}: written, with report.md and report.json")


def _open(
    place: str,
    *,
    kind: datasets.Kind = "auto",
    config: str = "",
    split: str = "test",
    name: str | None = None,
    language: str = "en",
    rows: int | None = None,
    keep_empty: bool = False,
    regime: str = regimes.NONE,
    allow_download: bool = False,
) -> Dataset:
    if place == harder.NONSPEECH:
        made = harder.made_nonspeech()
        return replace(made, name=name or made.name, expected_rows=rows)
    by = None if keep_empty else normalize.normalizer(normalize.default_for(language), language=language)
    found = datasets.open_dataset(
        place, normalizer=by, kind=kind, config=config, split=split, name=name, language=language, expected_rows=rows,
        allow_download=allow_download,
    )  # fmt: skip
    known = regimes.set_of(manifest.file_name("", *found.title), regimes.regime(regime))
    return found if known is None else replace(found, regime=regime)


@contextmanager
def _system(
    model: str,
    *,
    engine: EngineName,
    device: str,
    dtype: Dtype,
    base_url: str | None,
    api_key_env: str | None,
    transformers: bool,
    batch_size: int,
    vad: bool,
    language: str,
    allow_download: bool,
) -> Iterator[System]:
    if base_url is not None and transformers:
        raise UsageError("--base-url and --transformers: one system at a time; leave one of them out")
    ours = {"--engine": engine != "auto", "--no-vad": not vad}
    local = {"--device": device != "auto", "--dtype": dtype != "auto"}
    elsewhere = {**ours, **local} if base_url is not None else ours if transformers else {}
    if idle := [name for name, given in elsewhere.items() if given]:
        raise UsageError(f"{idle[0]}: does nothing for a system that is not ours; leave it out")
    if base_url is not None:
        from arkasr.evaluate.endpoint import EndpointSystem, Request

        with closing(
            EndpointSystem(base_url, model, key_variable=api_key_env, request=Request(parallel=batch_size))
        ) as endpoint:
            yield endpoint
    elif transformers:
        from arkasr.evaluate.hf import TransformersSystem

        yield TransformersSystem(
            model,
            device="cpu" if device == "auto" else device,
            dtype="float32" if dtype == "auto" else dtype,
            language=language,
            allow_download=allow_download,
        )
    else:
        yield OwnSystem.load(
            model, engine=engine, device=device, dtype=dtype, batch_size=batch_size, vad=vad, report=_say
        )


def _hear(sets: list[Dataset], system: System, output: Path, *, batch_size: int, warmup: int, limit: int | None) -> int:
    """Run them all; how many rows failed."""
    failed = 0
    for dataset in sets:
        title = " ".join(filter(None, dataset.title))
        with _progress(title) as progress:
            result = run.run(
                dataset, system, output, batch_size=batch_size, warmup_batches=warmup, limit=limit, report=progress
            )
        dropped = "".join(f", {count} left out: {why}" for why, count in result.survey.dropped.items())
        _say(f"{title}: {result.rows} rows{dropped}; {result.manifest}")
        for why in result.failed:
            _say(f"{title}: not heard, and counted as all wrong: {why}")
        failed += len(result.failed)
    return failed


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], object]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print(table: Table) -> None:
    print("\n".join(tables.markdown(table)))


def _notes(found: list[study.Results]) -> None:
    for system in found:
        for one in system.scores:
            for note in one.notes:
                _say(f"{system.name}, {one.name}: {note}")
        for note in system.notes:
            _say(f"{system.name}: {note}")


def _say(line: str) -> None:
    print(f"ark-asr: {line}", file=sys.stderr)
